"""The contract: values that cross between server and client, their wire form, experiment files, seeds, errors."""
