"""The actor side: environments, operators, rewards, safety, adder, actor loop and observers. No torch anywhere here."""
