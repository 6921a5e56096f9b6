"""The exporter role: turns the journal into a LeRobotDataset v3 while the run goes on."""
