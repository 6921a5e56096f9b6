"""One connection: the client's link and subscriber, the server's router and its sessions."""
