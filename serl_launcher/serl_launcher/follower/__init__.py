"""The follower of a host beyond the first: a copy of the gateway's journal, and a ring of it for the ranks here."""
