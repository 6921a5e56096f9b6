"""What a lab asks of its robot before a session: one file per question, `robot.py` for all of them."""
