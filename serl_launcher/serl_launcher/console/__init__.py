"""The operator's web page: a role of the learner, torch-free, off the gateway's event loop. docs/console.md."""
