"""The mesh of devices and what lies where on it. The only room, with `context`, in which mesh axes have names."""
