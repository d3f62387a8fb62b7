"""The test host: its environment, servers, clients and browsers, and the packed pack."""
