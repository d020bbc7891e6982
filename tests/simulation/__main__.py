"""See `main.py`."""

from tests.simulation.main import main

main()
