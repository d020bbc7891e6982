"""What prefill and decode workers share: start-up, status, the engine thread and its figures."""
