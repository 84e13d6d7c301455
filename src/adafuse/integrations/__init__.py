"""Bridges to other libraries' formats. Each module imports its library; nothing here is imported by the core."""
