// A collector of traces for tests: takes spans by OTLP over gRPC with OpenTelemetry's own types, and writes each as one line of JSON.
// Its arguments are the address to listen at and the file to write.
package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"log"
	"net"
	"os"
	"sync"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
)

type span struct {
	Trace, ID, Parent, Name, Kind, Error string
	Begin, End                           uint64
	Attributes, Resource                 map[string]any
}

type server struct {
	collector.UnimplementedTraceServiceServer
	turn sync.Mutex
	out  *json.Encoder
}

func values(attributes []*common.KeyValue) map[string]any {
	found := map[string]any{}
	for _, one := range attributes {
		switch value := one.Value.Value.(type) {
		case *common.AnyValue_StringValue:
			found[one.Key] = value.StringValue
		case *common.AnyValue_IntValue:
			found[one.Key] = value.IntValue
		case *common.AnyValue_BoolValue:
			found[one.Key] = value.BoolValue
		}
	}
	return found
}

func (s *server) Export(_ context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.turn.Lock()
	defer s.turn.Unlock()
	for _, resource := range request.ResourceSpans {
		of := values(resource.Resource.Attributes)
		for _, scope := range resource.ScopeSpans {
			for _, one := range scope.Spans {
				line := span{
					Trace: hex.EncodeToString(one.TraceId), ID: hex.EncodeToString(one.SpanId), Parent: hex.EncodeToString(one.ParentSpanId),
					Name: one.Name, Kind: one.Kind.String(), Begin: one.StartTimeUnixNano, End: one.EndTimeUnixNano,
					Attributes: values(one.Attributes), Resource: of,
				}
				if one.Status != nil {
					line.Error = one.Status.Code.String() + ": " + one.Status.Message
				}
				if err := s.out.Encode(line); err != nil {
					log.Fatal(err)
				}
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func main() {
	file, err := os.Create(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	serves := grpc.NewServer()
	collector.RegisterTraceServiceServer(serves, &server{out: json.NewEncoder(file)})
	log.Fatal(serves.Serve(listener))
}
