"""What runs a model after us, what it takes, and what it says of a model when it is asked."""
