"""What tests of several rooms share."""

# What hangs does so for ever; what is only slow, on a machine with much else to do, is over by then.
PATIENCE_S = 60.0
