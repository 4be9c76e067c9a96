"""The wire contract: *.proto, the stubs generated from them, and the feature frame. Imports nothing of ours."""
