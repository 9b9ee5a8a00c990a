"""Run the shipped graph and engines: sessions, and the checks of what they are fed. Level 3; no torch, no model/."""
