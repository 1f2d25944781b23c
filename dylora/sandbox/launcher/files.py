"""The files that programs may read, apart from what sets them up: the host, on any system, names
them too."""

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/urandom", "/dev/random", "/dev/zero")
INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages inside the standard library's folder."""
