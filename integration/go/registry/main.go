// Command registry serves go-containerregistry's registry on a free port of loopback, whose address it prints. With -certificate and
// -key over TLS; with -client-ca it wants a certificate of each client; with -login (user:password) it wants that.
package main

import (
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func guarded(handler http.Handler, login string) http.Handler {
	return http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		user, password, _ := request.BasicAuth()
		if subtle.ConstantTimeCompare([]byte(user+":"+password), []byte(login)) != 1 {
			writer.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(writer, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(writer, request)
	})
}

func run() error {
	certificate := flag.String("certificate", "", "PEM file")
	key := flag.String("key", "", "PEM file")
	clientCA := flag.String("client-ca", "", "PEM file of who vouches for clients")
	login := flag.String("login", "", "user:password")
	flag.Parse()
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true))
	if *login != "" {
		handler = guarded(handler, *login)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler, TLSConfig: &tls.Config{}}
	if *clientCA != "" {
		pem, err := os.ReadFile(*clientCA)
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s holds no certificate", *clientCA)
		}
		server.TLSConfig.ClientCAs, server.TLSConfig.ClientAuth = pool, tls.RequireAndVerifyClientCert
	}
	fmt.Println(listener.Addr())
	if *certificate == "" {
		return server.Serve(listener)
	}
	return server.ServeTLS(listener, *certificate, *key)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}
