"""A reward that can be checked: two-digit addition."""
