"""Every option there is: the schema, and a YAML file read into it."""
