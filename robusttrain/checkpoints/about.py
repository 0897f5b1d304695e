"""The metadata of exported programs."""

# The name of the text in a file that holds several.
ABOUT = "robusttrain.json"

# The key for the input, and what it takes.
INPUT = "input"
BYTES, FLOATS = "uint8, values from 0 to 255", "float32, values from 0 to 1"
