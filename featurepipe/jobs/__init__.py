"""A job: what is done every night with a growing pile of images, from one TOML file."""
