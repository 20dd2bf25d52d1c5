"""The config doctor: mistakes in a config, found before data are read or an object is made."""
