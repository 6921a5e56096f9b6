"""Learned rewards: a classifier over observations, trained from labelled episodes, served to actors."""
