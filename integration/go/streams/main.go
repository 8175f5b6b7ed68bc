// Streams drives a streaming server with the clients that kubectl and kubelet use: exec with bytes both ways, many execs, connections that
// are cut, and port forwarding. The answer is one JSON object on standard output.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
)

var (
	transport   = flag.String("transport", "spdy", "spdy or websocket")
	protocol    = flag.String("protocol", "", "exec: offer only this sub-protocol (websocket)")
	insecure    = flag.Bool("insecure", false, "accept any certificate")
	size        = flag.Int64("bytes", 0, "bytes to send: exec by standard input, forward by each connection")
	stdin       = flag.Bool("stdin", false, "exec: the URL has a standard input")
	stderr      = flag.Bool("stderr", false, "exec: the URL has a standard error")
	tty         = flag.Bool("tty", false, "exec: the URL has a terminal; its size 132x43 is sent")
	parallel    = flag.Int("parallel", 8, "execs, cut: how many at once")
	longest     = flag.Duration("longest", 200*time.Millisecond, "cut: longest time before a connection is cut")
	ports       = flag.String("port", "80", "forward: port of the pod")
	wantError   = flag.Bool("error", false, "forward: wait for an error to be told")
	connections = flag.Int("connections", 1, "forward: how many at once")
)

func main() {
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "streams [flags] exec URL | execs <URLS | cut <URLS | forward URL")
		flag.PrintDefaults()
	}
	flag.Parse()
	var answer any
	var err error
	switch flag.Arg(0) {
	case "exec":
		answer = execOnce(flag.Arg(1))
	case "execs":
		answer = execMany(execOnce)
	case "cut":
		answer = execMany(cut)
	case "forward":
		answer, err = forward(flag.Arg(1))
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
		os.Exit(1)
	}
}

func config() *rest.Config {
	return &rest.Config{TLSClientConfig: rest.TLSClientConfig{Insecure: *insecure}}
}

// pattern is an endless stream of bytes that are quick to make and do not repeat within a frame.
type pattern struct{ state uint64 }

func (p *pattern) Read(into []byte) (int, error) {
	for i := range into {
		if i%8 == 0 {
			p.state = p.state*6364136223846793005 + 1442695040888963407
		}
		into[i] = byte(p.state >> (8 * (i % 8)))
	}
	return len(into), nil
}

// meter counts and hashes what passes; it keeps the beginning.
type meter struct {
	hash  hash.Hash
	bytes int64
	head  []byte
}

func newMeter() *meter { return &meter{hash: sha256.New()} }

func (m *meter) Write(data []byte) (int, error) {
	m.hash.Write(data)
	m.bytes += int64(len(data))
	if room := 4096 - len(m.head); room > 0 {
		m.head = append(m.head, data[:min(room, len(data))]...)
	}
	return len(data), nil
}

// Flow is what passed on one stream.
type Flow struct {
	Bytes  int64  `json:"bytes"`
	Sha256 string `json:"sha256"`
	Head   string `json:"head"`
}

func (m *meter) flow() Flow {
	return Flow{m.bytes, hex.EncodeToString(m.hash.Sum(nil)), string(m.head)}
}

// Exec is how one exec went. Code is that of the command, -1 if there is none.
type Exec struct {
	Sent    Flow    `json:"sent"`
	Stdout  Flow    `json:"stdout"`
	Stderr  Flow    `json:"stderr"`
	Code    int     `json:"code"`
	Error   string  `json:"error"`
	Seconds float64 `json:"seconds"`
}

func executor(target *url.URL) (remotecommand.Executor, error) {
	if *transport == "spdy" {
		return remotecommand.NewSPDYExecutor(config(), http.MethodPost, target)
	}
	if *protocol != "" {
		return remotecommand.NewWebSocketExecutorForProtocols(config(), http.MethodGet, target.String(), *protocol)
	}
	return remotecommand.NewWebSocketExecutor(config(), http.MethodGet, target.String())
}

// sizes gives one size and then no more.
type sizes struct {
	once chan remotecommand.TerminalSize
}

func (s sizes) Next() *remotecommand.TerminalSize {
	size, more := <-s.once
	if !more {
		return nil
	}
	return &size
}

func execOnce(address string) Exec {
	sent, out, errs := newMeter(), newMeter(), newMeter()
	options := remotecommand.StreamOptions{Stdout: out, Tty: *tty}
	if *stdin {
		options.Stdin = io.TeeReader(io.LimitReader(&pattern{}, *size), sent)
	}
	if *stderr {
		options.Stderr = errs
	}
	if *tty {
		once := make(chan remotecommand.TerminalSize, 1)
		once <- remotecommand.TerminalSize{Width: 132, Height: 43}
		close(once)
		options.TerminalSizeQueue = sizes{once}
	}
	started := time.Now()
	err := stream(address, options)
	answer := Exec{Code: 0, Seconds: time.Since(started).Seconds()}
	var exit utilexec.CodeExitError
	switch {
	case errors.As(err, &exit):
		answer.Code = exit.Code
	case err != nil:
		answer.Code = -1
		answer.Error = err.Error()
	}
	answer.Stdout, answer.Stderr = out.flow(), errs.flow()
	if err == nil {
		// After a failure client-go may still be reading what was to be sent.
		answer.Sent = sent.flow()
	}
	return answer
}

func stream(address string, options remotecommand.StreamOptions) error {
	target, err := url.Parse(address)
	if err != nil {
		return err
	}
	client, err := executor(target)
	if err != nil {
		return err
	}
	return client.StreamWithContext(context.Background(), options)
}

// cut runs an exec through a relay that goes away after a random time, by a reset or an ordinary end.
func cut(address string) Exec {
	target, err := url.Parse(address)
	if err != nil {
		return Exec{Code: -1, Error: err.Error()}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return Exec{Code: -1, Error: err.Error()}
	}
	defer listener.Close()
	gone := make(chan struct{})
	go func() {
		relay(listener, target.Host)
		close(gone)
	}()
	through := *target
	through.Host = listener.Addr().String()
	done := make(chan Exec, 1)
	go func() { done <- execOnce(through.String()) }()
	select {
	case exec := <-done:
		return exec
	case <-gone:
		// client-go waits half a minute for the reply to a stream that was opened just before.
		return Exec{Code: -1, Error: "cut"}
	}
}

func relay(listener net.Listener, host string) {
	client, err := listener.Accept()
	if err != nil {
		return
	}
	defer client.Close()
	server, err := net.Dial("tcp", host)
	if err != nil {
		return
	}
	defer server.Close()
	go io.Copy(client, server)
	go io.Copy(server, client)
	time.Sleep(time.Duration(rand.Int64N(int64(*longest) + 1)))
	if rand.IntN(2) == 0 {
		server.(*net.TCPConn).SetLinger(0)
	}
}

// Many is how many execs went.
type Many struct {
	Codes   map[int]int    `json:"codes"`
	Errors  map[string]int `json:"errors"`
	Outputs map[string]int `json:"outputs"`
	Seconds float64        `json:"seconds"`
}

// execMany runs one exec for each line of standard input.
func execMany(run func(string) Exec) Many {
	many := Many{Codes: map[int]int{}, Errors: map[string]int{}, Outputs: map[string]int{}}
	started := time.Now()
	var lock sync.Mutex
	var group sync.WaitGroup
	room := make(chan struct{}, *parallel)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		target := lines.Text()
		room <- struct{}{}
		group.Go(func() {
			done := run(target)
			<-room
			lock.Lock()
			defer lock.Unlock()
			many.Codes[done.Code]++
			if done.Error != "" {
				many.Errors[done.Error]++
			}
			many.Outputs[done.Stdout.Head]++
		})
	}
	group.Wait()
	many.Seconds = time.Since(started).Seconds()
	return many
}

// Forward is how the connections of one port-forward went.
type Forward struct {
	Same    int            `json:"same"`
	Errors  map[string]int `json:"errors"`
	Said    string         `json:"said"`
	Seconds float64        `json:"seconds"`
}

// record is text that several write.
type record struct {
	lock sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(data []byte) (int, error) {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.text.Write(data)
}

func (r *record) String() string {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.text.String()
}

// forward sends a pattern through each connection at once, half-closes it, and expects the same bytes back.
func forward(address string) (*Forward, error) {
	target, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	dialer, err := portforward.NewSPDYOverWebsocketDialer(target, config())
	if *transport == "spdy" {
		carrier, upgrader, failed := spdy.RoundTripperFor(config())
		if failed != nil {
			return nil, failed
		}
		dialer, err = spdy.NewDialer(upgrader, &http.Client{Transport: carrier}, http.MethodPost, target), nil
	}
	if err != nil {
		return nil, err
	}
	stop, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	said := &record{}
	// Where client-go tells what came on an error stream.
	runtime.ErrorHandlers = []runtime.ErrorHandler{func(_ context.Context, err error, message string, _ ...any) {
		fmt.Fprintln(said, message, err)
	}}
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:" + *ports}, stop, ready, io.Discard, said)
	if err != nil {
		return nil, err
	}
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		return nil, fmt.Errorf("forward ports: %w", err)
	}
	local, err := forwarder.GetPorts()
	if err != nil {
		return nil, err
	}
	answer := &Forward{Errors: map[string]int{}}
	started := time.Now()
	var lock sync.Mutex
	var group sync.WaitGroup
	for number := range *connections {
		group.Go(func() {
			err := echoed(fmt.Sprintf("127.0.0.1:%d", local[0].Local), uint64(number))
			lock.Lock()
			defer lock.Unlock()
			if err != nil {
				answer.Errors[err.Error()]++
			} else {
				answer.Same++
			}
		})
	}
	group.Wait()
	answer.Seconds = time.Since(started).Seconds()
	// A failure is told a moment after its connection has ended.
	for deadline := time.Now().Add(5 * time.Second); *wantError && said.String() == "" && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	<-ended
	answer.Said = said.String()
	return answer, nil
}

func echoed(address string, seed uint64) error {
	connection, err := net.Dial("tcp", address)
	if err != nil {
		return errors.New("dial")
	}
	defer connection.Close()
	sent, received := newMeter(), newMeter()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.MultiWriter(connection, sent), io.LimitReader(&pattern{seed}, *size))
		if err == nil {
			err = connection.(*net.TCPConn).CloseWrite()
		}
		wrote <- err
	}()
	if _, err := io.Copy(received, connection); err != nil {
		return errors.New("read failed")
	}
	if err := <-wrote; err != nil {
		return errors.New("write failed")
	}
	if sent.flow() != received.flow() {
		return fmt.Errorf("sent %d bytes, received others", sent.bytes)
	}
	return nil
}
