"""Who may connect and do what: CURVE keys, the allow-list, the authenticator."""
