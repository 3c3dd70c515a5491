"""Devices and processes: the mesh, the job, its signals and the cache of compiled programs."""
