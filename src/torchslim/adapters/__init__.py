"""Tasks from other libraries: their data, loss and metric as a `ts.Task`. A library is imported when it is used."""
