"""The mesh of devices, the strategies pmap and fsdp, and exchange between hosts."""
