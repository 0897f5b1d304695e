"""The process and the machine that a run works on."""
