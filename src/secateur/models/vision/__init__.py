"""Vision networks: small ones of our own to train and measure on, and one with ImageNet weights."""
