"""What the cluster does to a job: signals, and later watchdogs and dead ranks."""
