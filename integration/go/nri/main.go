// A plugin of NRI for tests, with the interface's own library: it writes down all that it is told, one line of JSON each, and answers
// as it is configured to. The daemon that launches it hands it the configuration; started by hand, its arguments are the daemon's socket, its
// index, its name and the configuration, and each line of its standard input is a list of updates that it asks for by itself.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

type config struct {
	// The file that is written.
	Log string
	// Events to subscribe for; empty: all.
	Events string
	// By events: the error that they are answered with, how long the answer takes (ms), whether the plugin ends in the middle of it, and
	// updates of other containers.
	Fail   map[string]string
	Delay  map[string]int
	Exit   map[string]bool
	Update map[string][]json.RawMessage
	// By the names of containers.
	Adjust map[string]json.RawMessage
	// Why adjustments are rejected.
	Reject string
	// What happens to a request that it does not answer in time.
	FailRequest, KeepConnected bool
}

type plugin struct {
	config config
	turn   sync.Mutex
	stub   stub.Stub
}

func main() {
	p := &plugin{}
	options := []stub.Option{stub.WithOnClose(func() { os.Exit(0) })}
	if len(os.Args) == 5 {
		p.read(os.Args[4])
		options = append(options, stub.WithSocketPath(os.Args[1]), stub.WithPluginIdx(os.Args[2]), stub.WithPluginName(os.Args[3]))
		if p.config.FailRequest || p.config.KeepConnected {
			policy := &api.FailurePolicy{FailRequest: p.config.FailRequest, KeepConnected: p.config.KeepConnected}
			options = append(options, stub.WithFailurePolicy(policy))
		}
	}
	var err error
	if p.stub, err = stub.New(p, options...); err != nil {
		log.Fatalf("make the plugin: %v", err)
	}
	go p.ask()
	if err := p.stub.Run(context.Background()); err != nil {
		log.Fatalf("run the plugin: %v", err)
	}
}

func (p *plugin) read(text string) {
	if err := json.Unmarshal([]byte(text), &p.config); err != nil {
		log.Fatalf("configuration %q: %v", text, err)
	}
}

// Asks for the updates that standard input has.
func (p *plugin) ask() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var list []json.RawMessage
		if err := json.Unmarshal(lines.Bytes(), &list); err != nil {
			log.Fatalf("updates %q: %v", lines.Text(), err)
		}
		failed, err := p.stub.UpdateContainers(updates(list))
		names := []string{}
		for _, one := range failed {
			names = append(names, one.ContainerId)
		}
		line := map[string]any{"event": "UpdateContainers", "failed": names}
		if err != nil {
			line["error"] = err.Error()
		}
		p.write(line)
	}
}

func updates(list []json.RawMessage) []*api.ContainerUpdate {
	var made []*api.ContainerUpdate
	for _, text := range list {
		one := &api.ContainerUpdate{}
		if err := protojson.Unmarshal(text, one); err != nil {
			log.Fatalf("update %s: %v", text, err)
		}
		made = append(made, one)
	}
	return made
}

func (p *plugin) write(line map[string]any) {
	p.turn.Lock()
	defer p.turn.Unlock()
	text, err := json.Marshal(line)
	if err != nil {
		log.Fatalf("write: %v", err)
	}
	file, err := os.OpenFile(p.config.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		log.Fatalf("write: %v", err)
	}
	defer file.Close()
	if _, err := file.Write(append(text, '\n')); err != nil {
		log.Fatalf("write: %v", err)
	}
}

func raw(message proto.Message) json.RawMessage {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		log.Fatalf("encode: %v", err)
	}
	return text
}

// Writes an event down, and behaves as the configuration has it.
func (p *plugin) on(event string, about map[string]proto.Message) error {
	line := map[string]any{"event": event}
	for name, message := range about {
		line[name] = raw(message)
	}
	p.write(line)
	if p.config.Exit[event] {
		os.Exit(1)
	}
	time.Sleep(time.Duration(p.config.Delay[event]) * time.Millisecond)
	if why := p.config.Fail[event]; why != "" {
		return errors.New(why)
	}
	return nil
}

func pair(pod *api.PodSandbox, container *api.Container) map[string]proto.Message {
	return map[string]proto.Message{"pod": pod, "container": container}
}

func one(pod *api.PodSandbox) map[string]proto.Message {
	return map[string]proto.Message{"pod": pod}
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	if config != "" {
		p.read(config)
	}
	p.write(map[string]any{
		"event": "Configure", "runtime": runtime, "version": version, "nri": p.stub.RuntimeNRIVersion(),
		"registration": p.stub.RegistrationTimeout().Milliseconds(), "request": p.stub.RequestTimeout().Milliseconds(),
		"environment": os.Environ(),
	})
	if p.config.Events == "" {
		return 0, nil
	}
	return api.ParseEventMask(p.config.Events)
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	line := map[string]any{"event": "Synchronize"}
	shown := []json.RawMessage{}
	for _, pod := range pods {
		shown = append(shown, raw(pod))
	}
	line["pods"] = shown
	shown = []json.RawMessage{}
	for _, container := range containers {
		shown = append(shown, raw(container))
	}
	line["containers"] = shown
	p.write(line)
	return updates(p.config.Update["Synchronize"]), p.on("Synchronized", nil)
}

func (p *plugin) Shutdown(context.Context) {
	_ = p.on("Shutdown", nil)
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.on("RunPodSandbox", one(pod))
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	return p.on("UpdatePodSandbox", map[string]proto.Message{"pod": pod, "overhead": overhead, "resources": resources})
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.on("PostUpdatePodSandbox", one(pod))
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.on("StopPodSandbox", one(pod))
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.on("RemovePodSandbox", one(pod))
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.on("CreateContainer", pair(pod, container)); err != nil {
		return nil, nil, err
	}
	var adjust *api.ContainerAdjustment
	if text := p.config.Adjust[container.Name]; text != nil {
		adjust = &api.ContainerAdjustment{}
		if err := protojson.Unmarshal(text, adjust); err != nil {
			log.Fatalf("adjustment %s: %v", text, err)
		}
	}
	return adjust, updates(p.config.Update["CreateContainer"]), nil
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.on("PostCreateContainer", pair(pod, container))
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.on("StartContainer", pair(pod, container))
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.on("PostStartContainer", pair(pod, container))
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	err := p.on("UpdateContainer", map[string]proto.Message{"pod": pod, "container": container, "resources": resources})
	made := updates(p.config.Update["UpdateContainer"])
	for _, update := range made {
		if update.ContainerId == "" {
			update.ContainerId = container.Id
		}
	}
	return made, err
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.on("PostUpdateContainer", pair(pod, container))
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	return updates(p.config.Update["StopContainer"]), p.on("StopContainer", pair(pod, container))
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.on("RemoveContainer", pair(pod, container))
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, request *api.ValidateContainerAdjustmentRequest) error {
	if err := p.on("ValidateContainerAdjustment", map[string]proto.Message{"request": request}); err != nil {
		return err
	}
	if p.config.Reject != "" {
		return errors.New(p.config.Reject)
	}
	return nil
}
