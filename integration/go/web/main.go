// Command web answers HTTP as the web servers of the test images do. WEB_PORT is its port (80), WEB_KIND nginx or httpd.
package main

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
)

// Title that the master process of nginx gives itself; a spec looks for it in the command line of process 1.
const masterTitle = "nginx: master process nginx -g daemon off;"

func setting(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "web:", err)
	os.Exit(1)
}

func becomeNginx() {
	if !strings.HasPrefix(os.Args[0], "nginx: master") {
		self, err := os.Executable()
		if err != nil {
			fail(err)
		}
		fail(syscall.Exec(self, []string{masterTitle}, os.Environ()))
	}
	if err := os.MkdirAll("/var/run", 0o755); err != nil {
		fail(err)
	}
	if err := os.WriteFile("/var/run/nginx.pid", fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil {
		fail(err)
	}
}

func main() {
	kind, port := setting("WEB_KIND", "nginx"), setting("WEB_PORT", "80")
	if kind == "nginx" {
		becomeNginx()
	} else {
		fmt.Fprintf(os.Stderr, "httpd: serving on port %s\n", port)
	}
	http.HandleFunc("/", func(answer http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(answer, "<html><body><h1>%s works</h1></body></html>\n", kind)
	})
	fail(http.ListenAndServe(":"+port, nil))
}
