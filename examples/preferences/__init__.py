"""Public preference pairs in their usual form: that the format and the lengths work."""
