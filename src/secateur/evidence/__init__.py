"""What is learnt about a model on calibration data: gathered once, shared by every method."""
