"""Quality, size and speed, each with the protocol it was measured under."""
