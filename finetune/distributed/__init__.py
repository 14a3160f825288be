"""Several processes: who is who, agree, share out, fail together."""
