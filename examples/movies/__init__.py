"""The same course for a real model: SmolLM2-135M-Instruct learns from ratings of people."""
