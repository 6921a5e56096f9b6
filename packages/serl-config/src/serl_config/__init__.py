"""What both sides say and judge the same way: a mistake of the user in one line, the stages of a process reward."""
