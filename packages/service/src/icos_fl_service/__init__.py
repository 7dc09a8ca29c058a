"""What a service of ours is: settings, logs, health, metrics, and an end in time."""
