"""What the card of a student says, and how: facts out of results.json, licences, where models came from."""
