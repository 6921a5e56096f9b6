"""What every role of a run shares: folder, config, schedule, published parameters, the way to the gateway."""
