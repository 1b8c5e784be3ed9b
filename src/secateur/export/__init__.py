"""Writing what was cut in forms others can load; each is re-opened and verified."""
