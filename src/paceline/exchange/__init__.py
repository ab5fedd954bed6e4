"""What ranks tell each other about their gradients and parameters, when, and how it is merged."""
