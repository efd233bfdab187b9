"""The run file and the sweep file: what they may say, read and refused."""
