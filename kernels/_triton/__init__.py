"""The loss arithmetic in Triton kernels, imported when a call asks for it: importing Triton takes long."""
