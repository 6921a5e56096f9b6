"""Policy actions: the engine, the policy server role, and the same policy inside an actor's process."""
