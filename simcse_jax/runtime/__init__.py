"""Devices and processes: the mesh, the job, its signals, the cache of compiled programs."""
