"""LeRobot datasets from elsewhere, read in one way by everything that takes one."""
