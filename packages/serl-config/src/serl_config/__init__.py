"""What both sides say and judge the same way: a mistake in the config in one line, the stages of a process reward."""
