"""The methods that adafuse is compared with."""
