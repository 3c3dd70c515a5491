"""Files and folders written whole or not at all, here and on object stores."""
