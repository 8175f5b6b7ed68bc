module windlass.test/web

go 1.24
