"""Learning rules: what is accepted, which loss, which tensors are published."""
